"""What each kind of layer tells the rest of the engine; needs no torch until a layer is built."""
