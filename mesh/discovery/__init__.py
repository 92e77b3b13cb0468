"""Where nodes are: their own addresses, and later each other on the local network."""
