"""What a command does, from a recipe to a run folder. Orders the steps; each is done by a layer below."""
