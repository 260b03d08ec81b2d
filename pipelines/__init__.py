"""When the statistics are computed, and with what. Start reading at `pipelines.definitions`."""
