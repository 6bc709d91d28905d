"""What runs next: the state a policy sees, the planner that keeps its promises, and the step it produces."""
