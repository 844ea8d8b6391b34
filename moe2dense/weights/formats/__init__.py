"""Know how quantised weights lie on disk, and turn each into floats by itself: one expert is unpacked, no other is read."""
