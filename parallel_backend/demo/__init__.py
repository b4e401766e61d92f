"""What the demo draws: captioned scenes, their captions as conditioning, and a check of what a picture shows."""
