//! The network devices of the calling thread's namespace, as getifaddrs(3) tells them.
//!
//! Owns that one question. Refuses to change anything.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Its number.
    pub index: u32,
    /// Its address on an Ethernet link; zeros where it has none.
    pub mac: [u8; 6],
    /// Its addresses of IP.
    pub addresses: Vec<IpAddr>,
    /// The longest packet it takes.
    pub mtu: u32,
    /// Packets go out by it: a device that was only just brought up may drop them a moment longer.
    pub is_running: bool,
}

/// All of them.
pub fn devices() -> io::Result<Vec<Device>> {
    let mut first: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: writes the head of a list, which is freed below.
    crate::check(unsafe { libc::getifaddrs(&mut first) }.into())?;
    let mut found: BTreeMap<String, Device> = BTreeMap::new();
    let mut next = first;
    while !next.is_null() {
        // SAFETY: not null, so an element of the list, which is freed after the loop.
        let item = unsafe { &*next };
        // SAFETY: each element has a name that ends in NUL.
        let name = unsafe { CStr::from_ptr(item.ifa_name) }.to_string_lossy().into_owned();
        let device = found.entry(name.clone()).or_default();
        device.name = name;
        device.is_running = item.ifa_flags & libc::IFF_RUNNING as u32 != 0;
        if !item.ifa_addr.is_null() {
            // SAFETY: an address begins with its family, and is as long as its family says.
            unsafe { note(device, item.ifa_addr) };
        }
        next = item.ifa_next;
    }
    // SAFETY: the list that getifaddrs made, once.
    unsafe { libc::freeifaddrs(first) };
    let mut devices: Vec<Device> = found.into_values().collect();
    for device in &mut devices {
        device.mtu = mtu(&device.name)?;
    }
    Ok(devices)
}

/// SAFETY: `address` is a whole socket address of its family.
unsafe fn note(device: &mut Device, address: *const libc::sockaddr) {
    // SAFETY: the caller's promise; each family has its structure.
    unsafe {
        match i32::from((*address).sa_family) {
            libc::AF_PACKET => {
                let link = &*address.cast::<libc::sockaddr_ll>();
                device.index = link.sll_ifindex as u32;
                if link.sll_halen == 6 {
                    device.mac.copy_from_slice(&link.sll_addr[..6]);
                }
            }
            libc::AF_INET => {
                let v4 = &*address.cast::<libc::sockaddr_in>();
                let bytes = v4.sin_addr.s_addr.to_ne_bytes();
                device.addresses.push(IpAddr::V4(Ipv4Addr::from(bytes)));
            }
            libc::AF_INET6 => {
                let v6 = &*address.cast::<libc::sockaddr_in6>();
                device.addresses.push(IpAddr::V6(Ipv6Addr::from(v6.sin6_addr.s6_addr)));
            }
            _ => {}
        }
    }
}

fn mtu(name: &str) -> io::Result<u32> {
    use std::os::fd::AsRawFd;
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    // SAFETY: all-zero is a valid ifreq, and the ioctl reads the name in it and writes the number.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        crate::check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU, &mut request).into())?;
        Ok(request.ifr_ifru.ifru_mtu as u32)
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_loopback_device_is_there() {
        let devices = super::devices().unwrap();
        let lo = devices.iter().find(|d| d.name == "lo").unwrap();
        assert_eq!(lo.index, 1);
        assert!(lo.mtu > 0);
    }
}
