"""Finding damage, collecting garbage, carrying versions to another store."""
