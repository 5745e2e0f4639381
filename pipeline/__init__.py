"""Training of a DCGAN: from photographs on disk to checkpoints, pictures and a report."""
