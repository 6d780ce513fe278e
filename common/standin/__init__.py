"""The demo's data and models: drawn scenes, and small stand-ins for SAM and CLIP."""
