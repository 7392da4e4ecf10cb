"""The networks: LaVie's video UNet as Cinemo changes it, the frozen encoders around it, and their weight files."""
