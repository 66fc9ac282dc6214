"""The configuration: one TOML file, one frozen section per stage, unknown keys refused by name.

    TOML file + --set overrides -> loading -> Config -> every stage gets its section
                                                     -> fingerprint (run.json), toml_text (`streamsyn config`)

In reading order:
    sections          all keys with their defaults; `streamsyn config` prints the docstring below a key
    command_sections  the keys of `streamsyn train` and `streamsyn serve`
    fields            base class and field types; `operational` marks keys that shape no outputs
    loading           `load` and `parse_override`; errors name the key, the value and the nearest known key
    data_paths        what a path of data names: a local file, a URL, a dataset on the hub
    fingerprint       the keys that a resumed run must have in common with the first one
    toml_text         the configuration as commented TOML; the ten keys that `streamsyn init` writes

To add a key, add a field with a docstring to its section. Mark it as `operational` unless it shapes contexts
or samples: all other keys become part of the fingerprint. Decide whether clients of the daemon may set it:
then it goes into `ALLOWED` of `daemon/run_config.py`, else into `OPERATORS` of its test.
"""
