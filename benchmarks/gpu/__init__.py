"""What a person with a card runs first: `make gpu`."""
