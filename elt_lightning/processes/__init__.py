"""What training and sampling share: randomness, conditions, corruption schedules. Imports torch alone."""
