"""What at least two services share, named by content. Knows no service."""
