"""An S3 server on loopback, for tests: ``python -m tests.parallel.s3_store PORT BUCKET``."""

import signal
import sys


def main(port: int, bucket: str) -> None:
    """Serve ``s3://BUCKET`` at ``localhost:PORT``, from memory, until it is killed."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="localhost", port=port, verbose=False)
    server.start()
    boto3.client(
        "s3",
        endpoint_url=f"http://localhost:{port}",
        region_name="us-east-1",
        aws_access_key_id="somebody",
        aws_secret_access_key="secret",
    ).create_bucket(Bucket=bucket)
    print("ready", flush=True)
    signal.pause()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
