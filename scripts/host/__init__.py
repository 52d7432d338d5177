"""What the tests and the proof of the C++ host share."""
