"""The floor every run stands on: command line, config, device, run folder, tracking, checkpoints."""
