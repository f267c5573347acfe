"""The sampler command: options.py (its flags), folder.py (its output), command.py (the work)."""
