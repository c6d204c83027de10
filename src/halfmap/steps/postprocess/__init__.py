"""Resolution of two half maps, and maps to look at: sharpened, locally filtered, locally scaled."""
