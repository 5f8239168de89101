/* The floor: an echo over epoll in one thread, and no more of RFC 6455 than an echo needs.

   One read, one write for all that it brought, no handler, no UTF-8 check, no timeouts, no close handshake.
   What a socket does not take is kept, and the socket is not read until it is gone. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

struct buffer {
    uint8_t *data;
    size_t size, room;
};

struct client {
    int fd, open;  /* open: its handshake is over */
    size_t wanted; /* bytes of the frame that has begun */
    struct buffer in, out;
};

static struct buffer answer; /* to the read that is being served */

static void reserve(struct buffer *buffer, size_t more) {
    if (buffer->room - buffer->size >= more) return;
    buffer->room = (buffer->size + more) * 2;
    buffer->data = realloc(buffer->data, buffer->room);
    if (!buffer->data) abort();
}

static void append(struct buffer *buffer, const void *data, size_t size) {
    reserve(buffer, size);
    memcpy(buffer->data + buffer->size, data, size);
    buffer->size += size;
}

static void drop(struct buffer *buffer, size_t size) {
    buffer->size -= size;
    memmove(buffer->data, buffer->data + size, buffer->size);
}

/* SHA-1 (RFC 3174) of one short text. */

static uint32_t rotated(uint32_t word, int by) { return word << by | word >> (32 - by); }

static void sha1(const char *text, uint8_t digest[20]) {
    uint32_t hash[5] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0};
    uint8_t message[128] = {0};
    size_t size = strlen(text), blocks = (size + 8) / 64 + 1;
    memcpy(message, text, size);
    message[size] = 0x80;
    for (int i = 0; i < 4; i++) message[blocks * 64 - 1 - i] = size * 8 >> 8 * i;
    for (size_t block = 0; block < blocks; block++) {
        uint32_t w[80], a = hash[0], b = hash[1], c = hash[2], d = hash[3], e = hash[4];
        for (int i = 0; i < 16; i++) {
            const uint8_t *at = message + block * 64 + i * 4;
            w[i] = (uint32_t)at[0] << 24 | at[1] << 16 | at[2] << 8 | at[3];
        }
        for (int i = 16; i < 80; i++) w[i] = rotated(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
        for (int i = 0; i < 80; i++) {
            uint32_t f = i < 20   ? (b & c) | (~b & d)
                         : i < 40 ? b ^ c ^ d
                         : i < 60 ? (b & c) | (b & d) | (c & d)
                                  : b ^ c ^ d;
            uint32_t k = i < 20 ? 0x5a827999 : i < 40 ? 0x6ed9eba1 : i < 60 ? 0x8f1bbcdc : 0xca62c1d6;
            uint32_t next = rotated(a, 5) + f + e + k + w[i];
            e = d, d = c, c = rotated(b, 30), b = a, a = next;
        }
        hash[0] += a, hash[1] += b, hash[2] += c, hash[3] += d, hash[4] += e;
    }
    for (int i = 0; i < 20; i++) digest[i] = hash[i / 4] >> (24 - i % 4 * 8);
}

/* Answer the handshake; -1 where it is none. The key is found by the one spelling that browsers and peers have.
   This and `echo` return how many of the bytes they have used. */
static ssize_t shake_hands(struct client *client, uint8_t *data, size_t size) {
    static const char base64[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    static const char name[] = "Sec-WebSocket-Key: ";
    uint8_t *end = memmem(data, size, "\r\n\r\n", 4);
    if (!end) return size > 8192 ? -1 : 0;
    uint8_t *key = memmem(data, end - data, name, sizeof name - 1);
    if (!key || key + sizeof name - 1 + 24 > end) return -1;
    char joined[64], accept[29] = {0}, head[160];
    uint8_t digest[21] = {0};
    snprintf(joined, sizeof joined, "%.24s258EAFA5-E914-47DA-95CA-C5AB0DC85B11", (char *)key + sizeof name - 1);
    sha1(joined, digest);
    for (int i = 0; i < 27; i++) {
        int bit = i * 6, pair = digest[bit / 8] << 8 | digest[bit / 8 + 1];
        accept[i] = base64[pair >> (10 - bit % 8) & 63];
    }
    accept[27] = '=';
    append(&answer, head,
           snprintf(head, sizeof head,
                    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                    "Sec-WebSocket-Accept: %s\r\n\r\n",
                    accept));
    client->open = 1;
    return end + 4 - data;
}

/* Echo every whole frame that has come; -1 where one is a close frame or has no mask. */
static ssize_t echo(struct client *client, uint8_t *data, size_t came) {
    size_t at = 0;
    while (came - at >= 6) {
        uint8_t *frame = data + at;
        size_t left = came - at, size = frame[1] & 127, head = 2;
        if ((frame[0] & 15) == 8 || !(frame[1] & 128)) return -1;
        if (size >= 126) {
            size_t bytes = size == 126 ? 2 : 8;
            if (left < bytes + 6) break;
            for (size = 0; head < bytes + 2; head++) size = size << 8 | frame[head];
        }
        if (left < head + 4 + size) {
            client->wanted = head + 4 + size;
            break;
        }
        frame[1] &= 127;
        append(&answer, frame, head);
        reserve(&answer, size);
        uint8_t *to = answer.data + answer.size, *mask = frame + head, *from = mask + 4;
        uint64_t key, word;
        memcpy(&key, mask, 4);
        memcpy((uint8_t *)&key + 4, mask, 4);
        size_t i = 0;
        for (; i + 8 <= size; i += 8) {
            memcpy(&word, from + i, 8);
            word ^= key;
            memcpy(to + i, &word, 8);
        }
        for (; i < size; i++) to[i] = from[i] ^ mask[i & 3];
        answer.size += size;
        at += head + 4 + size;
    }
    return at;
}

/* Write, and return how much was taken; -1 where the peer is gone. */
static ssize_t put(struct client *client, struct buffer *buffer) {
    ssize_t sent = send(client->fd, buffer->data, buffer->size, MSG_NOSIGNAL);
    return sent < 0 && errno == EAGAIN ? 0 : sent;
}

/* Read once, answer once; -1 where the connection is over. Most clients leave nothing behind and need no buffer. */
static int serve(struct client *client) {
    static uint8_t shared[65536];
    struct buffer *kept = &client->in;
    size_t before = kept->size;
    if (before) reserve(kept, client->wanted > before ? client->wanted - before : sizeof shared);
    ssize_t got = before ? recv(client->fd, kept->data + before, kept->room - before, 0)
                         : recv(client->fd, shared, sizeof shared, 0);
    if (got <= 0) return got < 0 && errno == EAGAIN ? 0 : -1;
    if (before) kept->size += got;
    uint8_t *data = before ? kept->data : shared;
    size_t size = before + got;
    answer.size = 0;
    ssize_t used = client->open ? 0 : shake_hands(client, data, size);
    if (used >= 0 && client->open) {
        ssize_t more = echo(client, data + used, size - used);
        used = more < 0 ? -1 : used + more;
    }
    if (used < 0) return -1;
    if (before) drop(kept, used);
    else if ((size_t)used < size) append(kept, shared + used, size - used);
    if (!answer.size) return 0;
    ssize_t sent = put(client, &answer);
    if (sent < 0) return -1;
    if ((size_t)sent < answer.size) append(&client->out, answer.data + sent, answer.size - sent);
    return 0;
}

/* Write more of what was not taken. */
static int resume(struct client *client) {
    ssize_t sent = put(client, &client->out);
    if (sent < 0) return -1;
    drop(&client->out, sent);
    return 0;
}

int main(int count, char **arguments) {
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t size = sizeof address;
    struct epoll_event events[1024];
    int on = 1, poll = epoll_create1(0), listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (count < 2 || !inet_aton(arguments[1], &address.sin_addr)) return 2;
    if (bind(listener, (void *)&address, size) || listen(listener, 4096)) return 1;
    getsockname(listener, (void *)&address, &size);
    printf("listening on http://%s:%d\n", arguments[1], ntohs(address.sin_port));
    fflush(stdout);
    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &(struct epoll_event){.events = EPOLLIN});
    for (;;) {
        int ready = epoll_wait(poll, events, 1024, -1);
        for (int i = 0; i < ready; i++) {
            struct client *client = events[i].data.ptr;
            if (!client) {
                int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
                if (fd < 0) continue;
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                client = calloc(1, sizeof *client);
                if (!client) abort();
                client->fd = fd;
                epoll_ctl(poll, EPOLL_CTL_ADD, fd, &(struct epoll_event){.events = EPOLLIN, .data.ptr = client});
                continue;
            }
            size_t pending = client->out.size;
            if ((events[i].events & EPOLLOUT ? resume(client) : serve(client)) < 0) {
                close(client->fd);
                free(client->in.data);
                free(client->out.data);
                free(client);
            } else if (!pending != !client->out.size) {
                struct epoll_event next = {.events = client->out.size ? EPOLLOUT : EPOLLIN, .data.ptr = client};
                epoll_ctl(poll, EPOLL_CTL_MOD, client->fd, &next);
            }
        }
    }
}
