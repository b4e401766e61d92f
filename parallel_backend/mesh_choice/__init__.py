"""Which mesh a model gets where nobody has asked for one: as many ranks as a picture is worth spreading over."""
