"""Sources of scores and preferences: reward models, functions, servers; voters and panels."""
