"""Other people's training loops: transformers' Trainer, accelerate, Lightning. No framework is imported from here."""
