"""A thousand requests while machines are killed, join and leave: nothing lost, nothing changed."""
