"""What is done to the engine before it is shipped: its patches, its move to other sources, its sanitized build."""
