"""The networks: Hiera, its masked autoencoder, and how they are built and saved."""
