"""Two models on the same items: the one test and the one power that evaluation and reports both use."""
