"""What a model may ask while it writes; each tool is in :data:`megaforge.registry.TOOLS`."""
