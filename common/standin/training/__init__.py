"""How the stand-ins were trained."""
