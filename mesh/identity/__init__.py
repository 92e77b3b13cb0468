"""Who a node is, who says it may take part, and how a newcomer is let in."""
