"""Where every published number comes from."""
