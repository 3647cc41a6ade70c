"""What a recipe stands on and another could too: chats, packing, spans, tags, images, targets …"""
