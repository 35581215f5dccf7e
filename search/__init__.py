"""Choose one state per operator: exact elimination, an ILP that must agree, and a price for memory. README.md has the why."""
