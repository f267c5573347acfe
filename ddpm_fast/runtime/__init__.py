"""What a process runs on: device, CUDA graphs, ranks and their heartbeat, monitor of the host."""
