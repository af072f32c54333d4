"""Devices whose queues another program serves (vhost-user): this side hands over, and sees no request."""
