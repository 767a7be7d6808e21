"""All that is known of PEFT: names of adapters and parameters, switching, files, and which kinds are fit for what."""
