"""SmolLM2-135M-Instruct, carried as a package."""
