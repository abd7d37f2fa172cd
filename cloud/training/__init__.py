"""Around a training: what teachers are worth before one begins, and what evidence it still waits for."""
