"""A teacher elsewhere writes the reasoning of annotated clips; what contradicts is refused."""
