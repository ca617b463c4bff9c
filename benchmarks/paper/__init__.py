"""The paper's protocol: streams of tasks, networks, methods, and the job that compares them."""
