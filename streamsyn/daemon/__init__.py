"""The daemon, `streamsyn serve`: many runs over one fleet, steered and read over HTTP. See README.md."""
