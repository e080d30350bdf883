//! Blocks of loopback addresses: each mesh gets a /24 of 127/8 of its own, so that several can run at
//! once and every program can use its well-known ports.

use std::{fs::File, io, net::Ipv4Addr, path::PathBuf};

use rand::Rng as _;

/// First host number of workloads; below are the control plane and the gateway.
const FIRST_POD: u8 = 11;
/// Host numbers of pods end here, so that `OUTBOUND_OFFSET` added to them stays inside the block.
const LAST_POD: u8 = 110;
/// A pod's outbound listeners live at its address plus this.
const OUTBOUND_OFFSET: u8 = 120;

/// A /24 that this process holds until it is dropped.
#[derive(Debug)]
pub struct Block {
    second: u8,
    third: u8,
    next_pod: u8,
    lock: PathBuf,
    _held: File,
}

/// The two addresses of one workload instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodAddress {
    /// What others reach it by; the sidecar listens here.
    pub ip: Ipv4Addr,
    /// Where the sidecar listens for what the workload sends.
    pub outbound: Ipv4Addr,
}

impl Block {
    /// Finds a block that no other process holds.
    ///
    /// # Errors
    /// The temporary folder cannot be written, or all tries met a held block.
    pub fn acquire() -> io::Result<Block> {
        let mut rng = rand::rng();
        for _ in 0..1000 {
            // 127.0 and 127.1 belong to others (resolvers listen on 127.0.0.53, Debian uses 127.0.1.1).
            let (second, third) = (rng.random_range(16..=250), rng.random_range(0..=255));
            let lock = std::env::temp_dir().join(format!("lateen-127.{second}.{third}.lock"));
            let file = File::create(&lock)?;
            if file.try_lock().is_ok() {
                return Ok(Block {
                    second,
                    third,
                    next_pod: FIRST_POD,
                    lock,
                    _held: file,
                });
            }
        }
        Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "no free block of loopback addresses found in 1000 tries",
        ))
    }

    /// Address of Auth.
    pub fn auth(&self) -> Ipv4Addr {
        self.host(1)
    }

    /// Address of Pilot.
    pub fn pilot(&self) -> Ipv4Addr {
        self.host(2)
    }

    /// Address of Mixer.
    pub fn mixer(&self) -> Ipv4Addr {
        self.host(3)
    }

    /// Address of the ingress gateway.
    pub fn gateway(&self) -> Ipv4Addr {
        self.host(4)
    }

    /// An address for something outside the mesh, `index` from 0 to 5.
    pub fn outside(&self, index: u8) -> Ipv4Addr {
        self.host(5 + index.min(5))
    }

    /// The next unused pair of addresses.
    ///
    /// # Errors
    /// The block has room for a hundred workload instances.
    pub fn pod(&mut self) -> io::Result<PodAddress> {
        if self.next_pod > LAST_POD {
            return Err(io::Error::new(
                io::ErrorKind::AddrNotAvailable,
                "more than 100 workload instances in one local mesh",
            ));
        }
        let number = self.next_pod;
        self.next_pod += 1;
        Ok(PodAddress {
            ip: self.host(number),
            outbound: self.host(number + OUTBOUND_OFFSET),
        })
    }

    fn host(&self, number: u8) -> Ipv4Addr {
        Ipv4Addr::new(127, self.second, self.third, number)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.lock));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_blocks_are_different_and_addresses_are_not_given_twice() {
        let mut one = Block::acquire().unwrap();
        let two = Block::acquire().unwrap();
        assert_ne!(one.auth(), two.auth());
        let (a, b) = (one.pod().unwrap(), one.pod().unwrap());
        assert_ne!(a, b);
        assert_ne!(a.outbound, b.ip);
    }
}
