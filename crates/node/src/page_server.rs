//! The holder's side of page traffic: images of processes that left, read by those that need their pages.
//!
//! Owns the images, who uses each, and the threads' work on page connections. Refuses to know moves and processes: an
//! image is two open files (`/proc/PID/mem` and `pagemap`), which stay good as long as any process shares the memory.
//! Invariants: an image goes only when everyone who claimed it has released it (a broken connection releases nothing),
//! or when the daemon [removes](ImageStore::remove) it; only registered regions are readable; a page without content is
//! never touched, it is answered as absent.

mod image;
mod session;

use dunlin_proto::ids::ImageId;
use dunlin_proto::pages::ClientId;
use image::Image;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Called when the last client has released an image; it is no longer in the store then.
pub type OnUnused = Box<dyn FnOnce(ImageId) + Send>;

/// An image to be served.
pub struct NewImage {
    /// Its name.
    pub id: ImageId,
    /// `/proc/PID/mem` of a process with this memory, opened for reading.
    pub mem: File,
    /// `/proc/PID/pagemap` of the same.
    pub pagemap: File,
    /// A process that shares the memory and stays (the image keeper): its memory is then read with one copy less.
    pub keeper: Option<i32>,
    /// What may be read: first address and number of pages.
    pub regions: Vec<(u64, u64)>,
    /// Called when nobody needs it any more.
    pub on_unused: OnUnused,
}

/// What an image has done so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageStatus {
    /// Its name.
    pub id: ImageId,
    /// Who uses it; empty while the first client is still expected.
    pub clients: Vec<ClientId>,
    /// Pages sent.
    pub pages_sent: u64,
}

/// Why a page connection ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The connection broke. Claims stay; the client will come again.
    #[error("page connection: {0}")]
    Connection(#[from] std::io::Error),
    /// The image is to come: the client hears nothing of that, and comes again.
    #[error("page connection: image {0:?} is not here yet")]
    NotYet(ImageId),
    /// The client asked for an image that is not here.
    #[error("page connection: there is no image {0:?} here; hint: it was released, or this daemon was restarted")]
    UnknownImage(ImageId),
    /// The client asked for memory outside the image.
    #[error("page connection: {address:#x} is outside image {image:?}")]
    Outside {
        /// The image.
        image: ImageId,
        /// What was asked for.
        address: u64,
    },
    /// The memory could not be read: the client gets nothing, rather than zeros.
    #[error("page connection: image {image:?} cannot be read at {address:#x}: {source}; hint: is its keeper alive?")]
    Unreadable {
        /// The image.
        image: ImageId,
        /// Where.
        address: u64,
        /// Why.
        source: std::io::Error,
    },
}

/// All images this node holds. Clones share them.
#[derive(Clone, Default)]
pub struct ImageStore {
    images: Arc<Mutex<BTreeMap<ImageId, Held>>>,
    /// Those of a former daemon that are still to be made: who asks for one must not take it for released.
    coming: Arc<Mutex<BTreeSet<ImageId>>>,
}

struct Held {
    image: Arc<Image>,
    claims: Claims,
    pages_sent: Arc<AtomicU64>,
    on_unused: OnUnused,
}

/// Who an image is kept for.
enum Claims {
    /// The first client, who has not come yet.
    Expected,
    /// Those who came and have not released it.
    By(BTreeSet<ClientId>),
}

impl ImageStore {
    /// A store without images.
    pub fn new() -> ImageStore {
        ImageStore::default()
    }

    /// Serves an image from now on, and keeps it until its first client has come and all clients have released it.
    pub fn register(&self, new: NewImage) {
        let held = Held {
            image: Arc::new(Image::new(new.id, new.mem, new.pagemap, new.keeper, new.regions)),
            claims: Claims::Expected,
            pages_sent: Arc::default(),
            on_unused: new.on_unused,
        };
        let id = new.id;
        tracing::debug!(?id, keeper = ?new.keeper, "an image is served");
        self.lock().insert(id, held);
        self.will_not_come(id);
    }

    /// An image that a former daemon had promised will be registered, or [will not](Self::will_not_come).
    pub fn will_come(&self, id: ImageId) {
        self.coming().insert(id);
    }

    /// It is here, or was released before.
    pub fn will_not_come(&self, id: ImageId) {
        self.coming().remove(&id);
    }

    /// From now on the image's memory is also that of this process, which stays: see [`NewImage::keeper`].
    pub fn set_keeper(&self, id: ImageId, pid: i32) {
        if let Some(held) = self.lock().get(&id) {
            held.image.set_keeper(pid);
        }
    }

    /// From now on this of the image may be read: it was served while its process ran, which has changed its mappings
    /// since. False if it is not there.
    pub fn set_regions(&self, id: ImageId, regions: Vec<(u64, u64)>) -> bool {
        let image = self.lock().get(&id).map(|held| held.image.clone());
        let known = image.is_some();
        image.iter().for_each(|image| image.set_regions(regions.clone()));
        known
    }

    /// Forgets an image without calling back, whoever claims it: its process runs here again, or the move was aborted.
    /// Connections that use it keep its files open until they end. Returns whether there was one.
    pub fn remove(&self, id: ImageId) -> bool {
        self.will_not_come(id);
        self.lock().remove(&id).is_some()
    }

    /// Releases a claim in the name of a client that will not come again (its node is dead).
    pub fn release(&self, id: ImageId, client: ClientId) {
        let mut images = self.lock();
        let Some(Held {
            claims: Claims::By(clients),
            ..
        }) = images.get_mut(&id)
        else {
            return;
        };
        clients.remove(&client);
        tracing::debug!(?id, ?client, left = clients.len(), "an image is released");
        if clients.is_empty() {
            let held = images.remove(&id).expect("it was there");
            drop(images);
            (held.on_unused)(id);
        }
    }

    /// Every image and who uses it.
    pub fn status(&self) -> Vec<ImageStatus> {
        let images = self.lock();
        let status = images.iter().map(|(id, held)| ImageStatus {
            id: *id,
            clients: match &held.claims {
                Claims::Expected => Vec::new(),
                Claims::By(clients) => clients.iter().copied().collect(),
            },
            pages_sent: held.pages_sent.load(Ordering::Relaxed),
        });
        status.collect()
    }

    /// Serves one page connection on the calling thread until the client ends it. The client's
    /// [`Hello`](dunlin_proto::pages::Hello) is still to be read from it.
    pub fn serve(&self, stream: TcpStream) -> Result<(), ServeError> {
        let closer = stream.try_clone()?;
        let end = session::serve(self, stream);
        // Whoever else has a copy of the stream: the client must see the end. If it has seen it first, so be it.
        let _ = closer.shutdown(Shutdown::Both);
        end
    }

    fn claim(&self, id: ImageId, client: ClientId) -> Option<(Arc<Image>, Arc<AtomicU64>)> {
        let mut images = self.lock();
        let held = images.get_mut(&id)?;
        tracing::debug!(?id, ?client, "an image is claimed");
        match &mut held.claims {
            Claims::Expected => held.claims = Claims::By(BTreeSet::from([client])),
            Claims::By(clients) => drop(clients.insert(client)),
        }
        Some((held.image.clone(), held.pages_sent.clone()))
    }

    fn coming(&self) -> std::sync::MutexGuard<'_, BTreeSet<ImageId>> {
        self.coming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<ImageId, Held>> {
        // Nothing panics while it holds the lock; if something did, the map itself is whole.
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
