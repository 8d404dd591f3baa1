"""What `adapt-pruner with` puts first on the path of the programs that it starts."""
