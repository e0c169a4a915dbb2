"""Output for users: the console, pictures of graphs, result.json, the table of a sweep."""
