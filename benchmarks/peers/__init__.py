"""streamsyn beside other software that sends prompts to servers and keeps the answers."""
