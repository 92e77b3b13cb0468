"""Twenty minutes of bad weather: paths that flap under a mesh that is asked all the time."""
