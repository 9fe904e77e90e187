"""What connects a tracer with other systems, each as an extra of its own; none is imported unless it is used."""
