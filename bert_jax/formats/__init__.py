"""Other people's folders, and our own as a pre-trained model."""
