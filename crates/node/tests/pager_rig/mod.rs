//! Sources and destinations in puppets, with a page server and a pager between them, over loopback TCP.
#![allow(dead_code, reason = "each test file uses its part")]

use dunlin_cluster::page_map::PageMap;
use dunlin_node::page_server::{ImageStore, NewImage};
use dunlin_node::pager::{Claims, Connections, NewSpace, Observer, Pager, SpaceHandle};
use dunlin_proto::ids::{ImageId, Slot};
use dunlin_sys::puppet::Puppet;
use dunlin_sys::uffd::{Features, Uffd, Watch};
use dunlin_sys::vmcopy;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub const PAGE: u64 = 4096;
/// Where the puppets' memory is: nothing else is near.
pub const BASE: u64 = 0x3000_0000_0000;
/// Longer than anything takes, on however busy a machine.
pub const LONG: Duration = Duration::from_secs(60);

/// One node's images, and the network before it.
pub struct Holder {
    pub store: ImageStore,
    address: std::net::SocketAddr,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    closing: Arc<AtomicBool>,
    /// Connections are refused while this is set.
    down: Arc<AtomicBool>,
    pub connects: Arc<AtomicUsize>,
    nonce: AtomicU64,
    slot: u16,
}

impl Holder {
    pub fn new(slot: u16) -> Holder {
        Self::slow(slot, None)
    }

    /// With a pause before every 16 KiB that a connection carries to the client.
    pub fn slow(slot: u16, pause: Option<Duration>) -> Holder {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let store = ImageStore::new();
        let streams: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let (store_there, streams_there) = (store.clone(), streams.clone());
        let closing = Arc::new(AtomicBool::new(false));
        let closing_there = closing.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                if closing_there.load(Ordering::SeqCst) {
                    return;
                }
                streams_there.lock().unwrap().push(stream.try_clone().unwrap());
                let store = store_there.clone();
                let stream = match pause {
                    None => stream,
                    Some(pause) => behind_a_slow_link(stream, pause),
                };
                std::thread::spawn(move || store.serve(stream));
            }
        });
        Holder {
            store,
            address,
            streams,
            closing,
            down: Arc::default(),
            connects: Arc::default(),
            nonce: AtomicU64::new(1),
            slot,
        }
    }

    /// Serves a puppet's memory; the receiver hears when nobody needs it any more.
    pub fn register(&self, puppet: &Puppet, regions: &[(u64, u64)]) -> (ImageId, Receiver<ImageId>) {
        let id = ImageId {
            holder: Slot(self.slot),
            nonce: self.nonce.fetch_add(1, Ordering::Relaxed),
        };
        let (send, receive) = channel();
        self.store.register(NewImage {
            id,
            mem: vmcopy::open_mem(puppet.pid()).unwrap(),
            pagemap: vmcopy::open_pagemap(puppet.pid()).unwrap(),
            keeper: Some(puppet.pid()),
            regions: regions.to_vec(),
            on_unused: Box::new(move |id| send.send(id).unwrap()),
        });
        (id, receive)
    }

    /// Breaks every connection.
    pub fn cut(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    pub fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
        if down {
            self.cut();
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::SeqCst);
        self.set_down(true);
        // Lets the listener see it.
        let _ = TcpStream::connect(self.address);
    }
}

/// A stream whose other end is `stream`, with a pause before every 16 KiB on the way there.
fn behind_a_slow_link(stream: TcpStream, pause: Duration) -> TcpStream {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();
    let carry = |mut from: TcpStream, mut to: TcpStream, pause: Duration| {
        std::thread::spawn(move || {
            let mut bytes = [0; 16 << 10];
            while let Ok(n @ 1..) = from.read(&mut bytes) {
                std::thread::sleep(pause);
                if to.write_all(&bytes[..n]).is_err() {
                    break;
                }
            }
            let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
        })
    };
    carry(stream.try_clone().unwrap(), far.try_clone().unwrap(), Duration::ZERO);
    carry(far, stream, pause);
    near
}

/// Reaches holders by the slot in the image's name.
pub fn connector(holders: &[&Holder]) -> Arc<dyn Fn(ImageId) -> io::Result<Connections> + Send + Sync> {
    let known: Vec<_> = holders
        .iter()
        .map(|h| (h.slot, h.address, h.down.clone(), h.connects.clone()))
        .collect();
    Arc::new(move |image| {
        let (_, address, down, connects) = known.iter().find(|k| k.0 == image.holder.0).expect("a known holder");
        connects.fetch_add(1, Ordering::Relaxed);
        if down.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        Ok(Connections {
            faults: TcpStream::connect(address)?,
            bulk: TcpStream::connect(address)?,
        })
    })
}

/// A puppet with these regions filled with the pattern of the seed, word 0 at the start of each.
pub fn filled(regions: &[(u64, u64)], seed: u64) -> Puppet {
    let puppet = Puppet::new().unwrap();
    let hand = puppet.hand(0);
    for &(start, pages) in regions {
        hand.map(start, pages * PAGE).unwrap();
        hand.fill(start, pages * PAGE, seed, 0).unwrap();
    }
    puppet
}

/// A puppet with these regions empty and watched.
pub fn watched(regions: &[(u64, u64)]) -> (Puppet, Uffd) {
    let puppet = Puppet::new().unwrap();
    let uffd = watch(&puppet, regions, Features::CHANGES | Features::WP_ASYNC);
    (puppet, uffd)
}

pub fn watch(puppet: &Puppet, regions: &[(u64, u64)], features: Features) -> Uffd {
    let hand = puppet.hand(0);
    let uffd = Uffd::from_fd(hand.userfaultfd().unwrap()).unwrap();
    uffd.negotiate(features).unwrap();
    for &(start, pages) in regions {
        hand.map(start, pages * PAGE).unwrap();
        uffd.register(start, pages * PAGE, Watch::MISSING).unwrap();
    }
    uffd
}

/// A map of these regions, all at one image.
pub fn map_of(regions: &[(u64, u64)], image: ImageId) -> PageMap {
    let mut map = PageMap::new();
    for &(start, pages) in regions {
        map.add_region(start, pages).unwrap();
        map.back_with(start, pages, image, start).unwrap();
    }
    map
}

pub fn adopt(pager: &Pager, puppet: &Puppet, uffd: Uffd, map: PageMap, holders: &[&Holder]) -> SpaceHandle {
    adopt_with(pager, puppet, uffd, map, holders, Arc::new(()), None)
}

pub fn adopt_with(
    pager: &Pager,
    puppet: &Puppet,
    uffd: Uffd,
    map: PageMap,
    holders: &[&Holder],
    observer: Arc<dyn Observer>,
    claims: Option<Claims>,
) -> SpaceHandle {
    let connect = connector(holders);
    let new = NewSpace {
        id: None,
        pid: Some(puppet.pid()),
        uffd,
        map,
        connect,
        observer,
        claims,
        journal: None,
        ahead: None,
    };
    pager.adopt(new).map_err(|(e, _)| e).unwrap()
}
