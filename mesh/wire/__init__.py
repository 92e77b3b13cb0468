"""What nodes say to each other, and how it becomes bytes."""
