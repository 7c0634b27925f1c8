//! The arithmetic of ports: which node gives out which by itself.
//!
//! Owns [`Slices`]. Refuses to know what a port is used for.

use dunlin_proto::ids::Slot;

/// Which node gives out a port by itself (as the source of a connection, or to a socket bound to port 0): the slice with the
/// number of its slot, of as many equal slices as the modulus says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slices {
    first: u16,
    width: u16,
    modulus: u16,
}

impl Slices {
    /// Cuts the ports from `first` to 65535 for a cluster of this modulus; `None`: there are too few for it.
    pub fn new(first: u16, modulus: u16) -> Option<Slices> {
        let ports = u32::from(u16::MAX) - u32::from(first) + 1;
        let width = u16::try_from(ports / u32::from(modulus.max(1))).ok()?;
        (width > 0 && first >= 1024).then_some(Slices { first, width, modulus })
    }

    /// How many ports each has.
    pub fn width(&self) -> u16 {
        self.width
    }

    /// The first and last port of a node.
    pub fn of(&self, slot: Slot) -> (u16, u16) {
        let first = self.first + slot.0 * self.width;
        (first, first + (self.width - 1))
    }

    /// The node whose slice a port is in.
    pub fn node(&self, port: u16) -> Option<Slot> {
        let slot = port.checked_sub(self.first)? / self.width;
        (slot < self.modulus).then_some(Slot(slot))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_names_the_node_that_gives_it_out() {
        let slices = Slices::new(20000, 64).unwrap();
        for slot in [0, 1, 63] {
            let (first, last) = slices.of(Slot(slot));
            assert_eq!(last - first + 1, 711);
            assert_eq!(slices.node(first), Some(Slot(slot)));
            assert_eq!(slices.node(last), Some(Slot(slot)));
        }
        assert_eq!(slices.node(19999), None);
        // What the division leaves over is nobody's.
        assert_eq!(slices.node(65535), None);
        assert_eq!(Slices::new(65000, 1024), None);
        assert_eq!(Slices::new(1024, 1).unwrap().of(Slot(0)), (1024, 65535));
    }
}
