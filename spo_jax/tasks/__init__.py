"""Built-in tasks: data that the package makes itself, with an exact grader."""
