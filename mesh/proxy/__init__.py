"""The OpenAI API on every node's own loopback, wherever the host is: hold, replay, and never a cut that looks whole."""
